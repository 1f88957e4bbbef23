"""How two tokenizers align: a report and a page."""
