"""The alignment methods, one module each; registered in `rayfuse.config.align.METHODS`."""
