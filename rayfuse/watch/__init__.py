"""A run's storage in; a local web page of its progress out, which updates by itself.

It reads what `rayfuse status` reads, so a run on another cluster is watched as well. What can go
wrong: storage of another schema version (`UserError`), a port that is taken (`UserError`); files
that cannot be read are listed on the page, and read again.
"""
