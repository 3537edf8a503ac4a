"""The pocket recipe: a model of a few million parameters and the made-up world that it learns, in minutes on a CPU."""
