"""Statistics of inputs against their definitions, whatever the batching."""

from __future__ import annotations

import torch

from maskgen.numerics.statistics import add_gram, add_squares, cholesky, damped_cholesky


def test_batches_add_up() -> None:
    x_TI = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    squares = gram = None
    for part_TI in x_TI.split([1, 30, 9]):
        squares, gram = add_squares(squares, part_TI), add_gram(gram, part_TI)
    assert squares is not None and gram is not None and gram.tokens == 40
    torch.testing.assert_close(gram.sum_II, x_TI.T @ x_TI)
    torch.testing.assert_close(squares, gram.sum_II.diagonal())


def test_a_factor_gives_the_damped_matrix_back_and_leaves_its_argument() -> None:
    x_TI = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    matrix_II = x_TI.T @ x_TI
    before_II = matrix_II.clone()
    lower_II = damped_cholesky(matrix_II, 0.25)
    assert torch.equal(matrix_II, before_II) and torch.equal(lower_II, lower_II.tril())
    wanted_II = matrix_II + 0.25 * matrix_II.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(lower_II @ lower_II.T, wanted_II)


def test_no_factor_is_none() -> None:
    assert cholesky(torch.eye(4) - torch.ones(4, 4)) is None
    assert cholesky(torch.full((4, 4), torch.nan)) is None
