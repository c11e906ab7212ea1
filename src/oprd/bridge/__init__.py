"""The bridge of OPRD-Bridge: linear maps between the hidden states of two models of any shape and tokenizer."""
