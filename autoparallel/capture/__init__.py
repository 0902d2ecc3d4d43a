"""HF causal LM -> fx program of its training forward -> cost-annotated Graph. Imports torch."""
