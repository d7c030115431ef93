"""Writing into blanks and scoring what could stand there, with a trained model."""
