"""Ray and its nodes: connecting, resources, preemption, metrics, logging, progress."""
