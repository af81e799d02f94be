"""How do positions get labels? One learner a file: keys in, an integer for each position and head out."""
