"""What a model says, and how well."""
