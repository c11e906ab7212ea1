"""Teachers: who answers on what the student wrote."""
