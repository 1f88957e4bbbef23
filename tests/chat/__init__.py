"""Conversations: templates, rows, capture, alignment, training and scores."""
