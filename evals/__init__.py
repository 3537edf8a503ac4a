"""Task runners, metrics and the report card of a model folder; every result is a record with n and standard error."""
