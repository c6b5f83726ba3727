"""From text to a corpus: documents, sentences, tokens, actions, windows."""
