"""Many runs that one YAML file describes, and what follows from their results."""
