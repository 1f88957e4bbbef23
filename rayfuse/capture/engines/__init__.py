"""What runs a source LLM: one file per engine."""
