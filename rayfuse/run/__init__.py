"""What a run is on disk: inputs, segmentation, fingerprints, folders."""
