"""The composed model: any causal language model with encoders, connectors and fusion."""
