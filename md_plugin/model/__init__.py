"""The HIP-NN network: radial sensitivities, interaction layers, and the model made of them."""
