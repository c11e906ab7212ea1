"""OPRD-Bridge, arXiv 2606.06021: low-rank maps between the hidden states of two models of any kind."""
