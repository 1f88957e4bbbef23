"""Two tokenizers and a text in; a report and an HTML page of their alignment out.

What can go wrong: tokenizers that share no token boundary, a text that is no UTF-8 (`UserError`).
"""
