"""Several aligned sources in; out comes one distribution per position, as training reads."""
