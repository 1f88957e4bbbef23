"""Documents in; rows out that fit every tokenizer of the recipe, in shards of about equal text.

What can go wrong: documents that are no text (rejected, each with its reason), files that are not
what their names say (rejected line by line, or as a whole), and no document at all (`ValueError`).
"""
