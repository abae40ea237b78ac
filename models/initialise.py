"""Initial weights that papers name, for networks whose own are others."""

from __future__ import annotations

from torch import nn

KINDS = ("model", "glorot_normal", "he_fan_out", "lecun_normal", "normal", "normal_linear")
"""Names of `initialise`."""

_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def initialise(model: nn.Module, kind: str) -> None:
    """Draws the weights of every convolution and linear layer anew, from torch's own generator.

    Everything else stays as it is: normalisation, embeddings and other parameters. Modules are
    visited in the model's order, so the same seed gives the same weights.

    - `model`: nothing is drawn; the network keeps what its builder gave it.
    - `glorot_normal`: variance 2 / (fan-in + fan-out), biases 0 (Glorot & Bengio, 2010, equation
      12), as in the networks of Frankle & Carbin, 2019. TensorFlow 1 cut theirs off at two standard
      deviations, and drew from a wider distribution so that about this variance was left; here
      nothing is cut off.
    - `he_fan_out`: convolutions with variance 2 / fan-out, linear layers with variance 2 / fan-in,
      biases 0 (He et al., 2015, arXiv:1502.01852, equations 14 and 10), as in the code of SFP for
      its ResNets.
    - `lecun_normal`: variance 1 / fan-in, biases 0 (LeCun et al., 1998, "Efficient BackProp",
      equation 16), as in the code of SNIP, which cuts it off as above.
    - `normal`: N(0, 0.01^2), biases 0, as in the code of Molchanov et al., 2017, for LeNet-300-100.
    - `normal_linear`: linear layers as by `normal`; convolutions uniform, of variance
      2 / (fan-in + fan-out) (Glorot & Bengio, 2010, equation 16), biases 0, as in that code for
      LeNet-5: it names N(0, 0.01^2) for convolutions too, by an argument that they do not read.

    Args:
        model: changed in place.
        kind: a name in KINDS.

    Raises:
        ValueError: another name.
    """
    if kind not in KINDS:
        raise ValueError(f"initialisation: found {kind!r}; allowed: {', '.join(KINDS)}")
    if kind == "model":
        return
    for module in model.modules():
        if not isinstance(module, _LAYERS):
            continue
        if kind == "glorot_normal":
            nn.init.xavier_normal_(module.weight)
        elif kind == "lecun_normal":
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
        elif kind == "normal" or (kind == "normal_linear" and isinstance(module, nn.Linear)):
            nn.init.normal_(module.weight, std=0.01)
        elif kind == "normal_linear":
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
