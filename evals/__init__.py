"""Task runners, metrics and the report card: what a model folder can do, as records with n and standard error."""
