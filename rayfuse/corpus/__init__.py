"""Documents in; rows out that fit every tokenizer of the recipe, in shards of about equal text.

What can go wrong: documents that hold no text (rejected, each with its reason), files whose content
does not match their format (rejected line by line, or entirely), more of either than the recipe
allows, and no document at all (`UserError`).
"""
