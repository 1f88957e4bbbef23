"""What a run is: frozen settings, read from a YAML recipe. Imports nothing else of rayfuse."""
