"""Chooses few sizes that hold random batches with little padding; a size is a number of atoms and one of neighbors."""

from collections.abc import Callable, Sequence

import numpy as np

QUANTILES = 32  # of each number, that sizes are chosen from

Sharing = Callable[[np.ndarray, int], Sequence[np.ndarray]]  # see parallel.devices.Shares


def random_needs(numbers: np.ndarray, batch_size: int, trials: int, devices: int, share_out: Sharing) -> np.ndarray:
    """Returns the most atoms and neighbors of a device in some random batches of crystals with `numbers` [C, 2].

    The batches, at least `trials` of them, [T, 2], are those of whole epochs: a crystal comes once in each.
    """
    rng, steps = np.random.default_rng(0), len(numbers) // batch_size
    needs = []
    for _ in range(-(-trials // steps)):
        chosen = rng.permutation(len(numbers))[: min(steps, trials) * batch_size]
        for batch in numbers[chosen].reshape(-1, batch_size, 2):
            shares = share_out(batch[:, 1], devices)
            needs.append(np.max([batch[share].sum(axis=0) for share in shares], axis=0))
    return np.array(needs)


def exceeded_once(needs: np.ndarray, batches: int) -> np.ndarray:
    """Returns numbers of atoms and neighbors, [2], that hardly one of so many random batches like `needs` exceeds.

    They are those of a normal distribution, corrected for skewness (Cornish and Fisher).
    """
    mean, std = needs.mean(axis=0), needs.std(axis=0)
    skewness = np.mean((needs - mean) ** 3, axis=0) / np.maximum(std, 1e-9) ** 3
    normal = np.sqrt(2 * np.log(max(batches, 100)))  # standard deviations, at least 3
    return mean + std * (normal + skewness.clip(0) * (normal**2 - 1) / 6)


def best_sizes(needs: np.ndarray, last: np.ndarray, blocks: np.ndarray, most: int) -> list[tuple[float, np.ndarray]]:
    """Finds for 1, 2, ..., `most` the sizes [k, 2] that batches with `needs` [T, 2] fill best; both numbers ascend.

    The `last` size [2] holds all batches. Every batch takes the first that holds it. The cost which is least comes with
    the sizes: the places for atoms and for neighbors over those that are needed, mean of the two, on average over the
    batches. It is least among sizes whose numbers are quantiles of those needed, in whole `blocks` [2].
    """
    quantiles = np.quantile(needs, np.linspace(0, 1, QUANTILES + 1), axis=0, method="higher")
    atoms, edges = (
        np.unique(np.append(np.minimum(block * np.ceil(column / block), end), end))
        for column, block, end in zip(quantiles.T, blocks, last, strict=True)
    )
    sizes = np.stack(np.meshgrid(atoms, edges, indexing="ij"), axis=-1).reshape(-1, 2)  # [G, 2]
    held = np.mean((needs[:, None, 0] <= sizes[:, 0]) & (needs[:, None, 1] <= sizes[:, 1]), axis=0)  # [G]
    price = np.mean(sizes / needs.mean(axis=0), axis=1)  # [G]
    # least[g]: for the batches that size g holds, if it is the largest of k; those before[g] are held by others
    least, before, found = held * price, [], []
    for number in range(most):
        if number:
            cost = least[:, None] + (held - held[:, None]) * price
            cost[~(sizes[:, None] <= sizes).all(axis=-1)] = np.inf
            before.append(cost.argmin(axis=0))
            least = cost.min(axis=0)
        chain = [len(sizes) - 1]
        for choice in reversed(before):
            chain.append(choice[chain[-1]])
        found.append((float(least[-1]), np.unique(sizes[chain], axis=0)))
    return found
