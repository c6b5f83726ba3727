"""Writing text sentence by sentence, and measuring what was written."""
