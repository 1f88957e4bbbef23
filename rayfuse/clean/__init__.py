"""Remove stored results that no recipe uses: recipes in, freed bytes out.

What any given recipe names is kept. While a job of another recipe may be at work in the storage,
nothing is removed.
"""
