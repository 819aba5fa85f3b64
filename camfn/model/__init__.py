"""The rooms that know `nn.Module`: the private copy, its forward passes, and what they tell."""
