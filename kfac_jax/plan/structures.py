"""How the curvature of different layers relates."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """Every layer has a block of its own.

    Cross-layer curvature is dropped (section 4.2).

    >>> BlockDiagonal()
    BlockDiagonal()
    """


@dataclasses.dataclass(frozen=True)
class BlockTridiagonal:
    """Neighbouring layers have cross-layer curvature, and the inverse is sparse.

    The approximation agrees with the Kronecker-factored Fisher on the blocks of each
    layer and of each two linked layers, `F_ij ≈ A_ij ⊗ G_ij`, and its inverse is zero
    in the blocks of all other pairs: that of a chain of layers is block-tridiagonal.

    A layer is linked to the layer that uses its output next: the first one in the order
    of the program whose input depends on it with no other such layer between. In a
    network that is not a chain (residual connections, branches) the links form a
    forest. Linked are layers of kinds "dense" and "conv" with a `Kronecker` block with
    two full factors, used once and outside of scans and conditionals, two of which must
    have the same number of positions in each example. What is not linked, and why, is
    in the report; it has a block of its own.

    Damping is factored (on the layers' own factors), so `damping_mode="exact"` is
    refused. A refresh takes two singular value decompositions for each link, which cost
    about ten times what Cholesky factorisations cost; statistics keep each linked
    layer's inputs and output gradients (patches, of convolutions) until the end of the
    backward pass.

    References:
      Martens & Grosse 2015, section 4.3 and appendix B.

    >>> BlockTridiagonal()
    BlockTridiagonal()
    """


Structure = BlockDiagonal | BlockTridiagonal
