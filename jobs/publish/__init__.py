"""Models to publish: weights, a card, and a program that draws samples without this project."""
