"""The scorer: log-likelihoods of continuations under a model, each token computed once and each logit only where wanted.

Requests become a forest of shared prefixes (prefix_tree.py). A node's tokens run through the model once, in a batch with
nodes of like length; its children continue from its keys and values. Only the places that predict a target are
unembedded, in pieces, and normalised in fp32: the logits of a whole batch, [B, S, V], never exist.

The model is dropless and in eval mode, so a score does not depend on what shares its batch beyond rounding; in fp32,
batch 1 and batch 8 agree within 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.encoding import TokenRequest, encode_requests, prefix_token, windows
from evaluation.prefix_cache import PrefixCache
from evaluation.prefix_tree import Node, build_tree
from evaluation.task import Answer, Request
from xmoe.errors import ConfigError
from xmoe.model.router import Routing

LOGITS_AT_ONCE = 1 << 25  # fp32 numbers: 128 MiB
TOKENS_AT_ONCE = {"cpu": 2048}  # more in one batch gains nothing on a CPU and costs memory
TOKENS_AT_ONCE_ACCELERATOR = 32768
CONTINUATIONS_AT_ONCE = 4  # of shared beginnings, however small the batch: with one at a time sharing gains little

Observer = Callable[[int, Routing], None]


class Scorer:
    """Scores requests with one model and one tokenizer.

    Args:
        batch_size: rows of a batch at most; short continuations of a shared beginning go four at a time even at 1.
        max_length: tokens the model sees at once; longer inputs lose their left end, pages are cut into windows.
        prefix: what stands in for an empty context: auto, bos, eos, none or an id (see encoding.prefix_token).
        num_experts_per_tok: overrides the model's K.
        observe: called with (layer, routing of real tokens) after every batch; padding is left out, and a prefix that
            many requests share counts once.
        norms: whether that routing needs `output_norm`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        prefix: str = "auto",
        num_experts_per_tok: int | None = None,
        observe: Observer | None = None,
        norms: bool = False,
    ):
        longest = model.config.max_position_embeddings
        if batch_size < 1:
            raise ConfigError(f"--batch-size {batch_size}: expected 1 or more")
        if max_length is not None and not 2 <= max_length <= longest:
            raise ConfigError(
                f"--max-length {max_length}: expected 2 to {longest}, the model's max_position_embeddings"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = min(longest, 4096) if max_length is None else max_length
        self.prefix = prefix_token(tokenizer, prefix)
        self.num_experts_per_tok = num_experts_per_tok
        self.observe = observe
        self.norms = norms
        self.device = model.device
        self.tokens_at_once = TOKENS_AT_ONCE.get(self.device.type, TOKENS_AT_ONCE_ACCELERATOR)
        self.tokens_computed = 0
        self.requests_cut = 0

    def loglikelihoods(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a (context, continuation), in their order."""
        answers: list[Answer] = [Answer()] * len(requests)
        for number, answer in self.score(requests):
            answers[number] = answer
        return answers

    def rolling(self, texts: Sequence[str]) -> list[Answer]:
        """The log-likelihood of whole texts, every token scored once; `is_greedy` means all of them."""
        answers: list[Answer] = [Answer()] * len(texts)
        for number, answer in self.score_rolling(texts):
            answers[number] = answer
        return answers

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """As :meth:`loglikelihoods`, but (number, answer) as soon as each is known, in the order of computation."""
        encoded = encode_requests(requests, self.tokenizer, self.prefix, self.max_length)
        self.requests_cut += sum(r.cut > 0 for r in encoded)
        return self.score_tokens(encoded)

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """As :meth:`rolling`, text by text as each is complete."""
        pieces: list[TokenRequest] = []
        owner: list[int] = []
        for number, ids in enumerate(self.tokenizer.encode_batch(list(texts))):
            parts = windows(ids, self.prefix, self.max_length)
            if not parts:
                yield number, Answer(0.0, True)
            pieces += parts
            owner += [number] * len(parts)
        sums = {number: (0.0, True, owner.count(number)) for number in set(owner)}
        for piece, answer in self.score_tokens(pieces):
            total, greedy, left = sums[owner[piece]]
            total, greedy, left = total + answer.loglikelihood, greedy and answer.is_greedy, left - 1
            sums[owner[piece]] = total, greedy, left
            if left == 0:
                yield owner[piece], Answer(total, greedy)

    def score_tokens(self, requests: Sequence[TokenRequest]) -> Iterator[tuple[int, Answer]]:
        """(number, answer) of requests that are ids already."""
        roots = build_tree([r.context for r in requests], [r.targets for r in requests])
        totals = [0.0] * len(requests)
        greedy = [True] * len(requests)
        left = [len(r.targets) for r in requests]
        with tqdm(total=len(requests), unit="request", disable=None, leave=False) as bar:
            for number, values, hits in self._descend([(root, 0) for root in roots], None):
                totals[number] += sum(values)
                greedy[number] &= all(hits)
                left[number] -= len(values)
                if left[number] == 0:
                    bar.update()
                    yield number, Answer(totals[number], greedy[number])

    def _descend(
        self, nodes: list[tuple[Node, int]], parent: PrefixCache | None
    ) -> Iterator[tuple[int, list[float], list[bool]]]:
        """Compute `nodes`, each continuing the row of `parent` named beside it, and then what continues them.

        Yields (request, log-probabilities of some of its targets, whether each was the likeliest token).
        """
        for batch in self._batches(nodes):
            cache, scores = self._forward(batch, parent)
            yield from scores
            children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if children:
                yield from self._descend(children, cache)

    def _batches(self, nodes: list[tuple[Node, int]]) -> Iterator[list[tuple[Node, int]]]:
        """Longest first: what does not fit into memory fails at once, and rows of a batch need little padding."""
        order = sorted(nodes, key=lambda n: -len(n[0].tokens))
        while order:
            longest = order[0][0]
            # Continuations are short, so a few of them have no more tokens than one whole row.
            whole_row = (longest.start + len(longest.tokens)) // len(longest.tokens)
            rows = max(self.batch_size, min(CONTINUATIONS_AT_ONCE, whole_row))
            rows = max(1, min(rows, self.tokens_at_once // len(longest.tokens)))
            yield order[:rows]
            order = order[rows:]

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[Node, int]], parent: PrefixCache | None):
        """One forward pass over the tokens of the batch's nodes; the cache for their children, and their scores."""
        lengths = [len(node.tokens) for node, _ in batch]
        width = max(lengths)
        tokens = torch.tensor([node.tokens + [0] * (width - n) for (node, _), n in zip(batch, lengths)])
        place = torch.arange(width)
        real = place < torch.tensor(lengths)[:, None]
        keep = any(node.children for node, _ in batch)
        cache = positions = None
        if keep or parent is not None:
            starts = torch.tensor([node.start for node, _ in batch])[:, None]
            positions = torch.where(real, starts + place, -1).to(self.device)
            cache = PrefixCache(self.model.config, parent, [row for _, row in batch], keep)
        # Without a cache, padding to the right is behind every real token: causal attention needs no positions then.
        features = self.model.features(
            tokens.to(self.device),
            cache,
            positions=positions,
            num_experts_per_tok=self.num_experts_per_tok,
            norms=self.norms,
        )
        self.tokens_computed += sum(lengths)
        if self.observe is not None:
            self._record(features.routing, real.flatten().to(self.device))
        return cache, self._scores(features.hidden, [node for node, _ in batch])

    def _record(self, routing: Sequence[Routing], real: Tensor) -> None:
        for layer, decided in enumerate(routing):
            fields = (None if field is None else field[real] for field in decided)
            self.observe(layer, Routing(*fields))

    def _scores(self, hidden: Tensor, nodes: list[Node]) -> list[tuple[int, list[float], list[bool]]]:
        """hidden [B, S, D] -> log-probabilities of the nodes' targets; choices of one place share its logits."""
        width = hidden.shape[1]
        places: dict[int, int] = {}  # flat place -> row of logits
        rows, targets, spans = [], [], []
        for row, node in enumerate(nodes):
            for span in node.spans:
                flat = row * width + span.offset
                rows += [places.setdefault(flat + i, len(places)) for i in range(len(span.targets))]
                targets += span.targets
                spans.append((span.request, len(span.targets)))
        if not spans:
            return []
        wanted = hidden.flatten(0, 1)[torch.tensor(list(places), device=hidden.device)]
        values, hits = self._log_probabilities(wanted, torch.tensor(rows), torch.tensor(targets))
        result, start = [], 0
        for request, count in spans:
            result.append((request, values[start : start + count], hits[start : start + count]))
            start += count
        return result

    def _log_probabilities(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Of targets[i] given hidden[rows[i]] (hidden [N, D]): the fp32 log-probability, and whether it is the largest."""
        values = torch.empty(len(rows))
        hits = torch.empty(len(rows), dtype=torch.bool)
        step = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for start in range(0, len(hidden), step):
            logits = self.model.unembed(hidden[start : start + step]).float()
            here = ((rows >= start) & (rows < start + step)).nonzero().flatten()
            row = (rows[here] - start).to(logits.device)
            target = targets[here].to(logits.device)
            chosen = logits[row, target] - logits.logsumexp(-1)[row]
            values[here] = chosen.cpu()
            hits[here] = (logits.argmax(-1)[row] == target).cpu()
        return values.tolist(), hits.tolist()
