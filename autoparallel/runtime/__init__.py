"""The emitted program at work: processes, pipeline, parameters, the single-device contract. Imports torch."""
