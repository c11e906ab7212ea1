"""Language models: tapping hidden states, generating, loading."""
