"""Tables, figures, the lens and the report."""
