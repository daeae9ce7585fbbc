"""What optimizers keep of old tasks when tasks come one after the other."""
