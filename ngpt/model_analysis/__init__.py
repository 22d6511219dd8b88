"""What quantisation and small steps do to a trained model, measured on held-out text: `ngpt analyze`. README.md has the definitions.

This file imports no torch, so that `ngpt analyze RUN` lists results in less than a second.
"""

DEFAULT_RECIPE = "nvfp4_nvidia"
ANALYSES = {
    "snr": "signal-to-noise ratios and correlations of every block linear in fprop, dgrad and wgrad",
    "ptq": "loss with weights, activations or both in the recipe's format, against none",
    "flatness": "loss along random normalised directions, and under weight noise of the quantiser's size",
    "curvature": "largest eigenvalue and trace of the Hessian, in the same normalised coordinates",
}
