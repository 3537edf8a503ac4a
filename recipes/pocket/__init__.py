"""The pocket recipe: a model of about a million parameters learns a synthetic world in minutes on a CPU."""
