"""Completions are samples of the policy, do not depend on the batch, and nothing is computed twice."""

import itertools

import pytest
import torch

from enumerable import EOS, every_completion, make_completions, make_policy, make_prompts
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.sampling import Sampling, counter_based_uniform, inverse_cdf
from lit_rlhf.types import Prompts
from tiny import make_llama, make_tokenizer

DRAWS = 100_000


def within_5_sigma(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    draws = counts.sum()
    sigma = (draws * probabilities * (1 - probabilities)).sqrt()
    return bool(((counts - draws * probabilities).abs() <= 5 * sigma + 1e-9).all())


# Noise


def test_noise_depends_on_its_counters_alone():
    one = counter_based_uniform(3, 1, [9], 5, 12)
    among_others = counter_based_uniform(3, 1, [5, 9, 2], 3, 7).view(3, 3, 7)
    assert torch.equal(among_others[1], one[:3, :7])


def test_every_counter_changes_the_noise():
    addresses = itertools.product((0, 1), (0, 1), (0, 1))
    rows = [row for seed, epoch, prompt in addresses for row in counter_based_uniform(seed, epoch, [prompt], 2, 4)]
    assert len({tuple(row.tolist()) for row in rows}) == 16


def test_noise_is_uniform_and_independent_along_the_tokens():
    noise = counter_based_uniform(0, 0, range(500), 4, 10)
    assert ((noise >= 0) & (noise < 1)).all()
    assert within_5_sigma(torch.histc(noise, 10, 0, 1), torch.full((10,), 0.1))
    centred = noise - 0.5
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean() * 12
    assert abs(neighbours) < 5 / (2000 * 9) ** 0.5


# Inverse CDF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-6])
def test_a_token_of_probability_zero_is_never_drawn(dtype, scale):
    probabilities = torch.tensor([0, 0.5, 0, 1e-7, 0.5, 0, 0], dtype=dtype) * scale
    noise = torch.tensor([0.0, 1e-300, 0.5, 1 - 1e-9, 1 - 2**-53, 1.0], dtype=torch.float64)
    drawn = inverse_cdf(probabilities.expand(len(noise), -1), noise)
    assert (probabilities[drawn] > 0).all()
    assert drawn[0] == 1 and drawn[-1] == 4


def test_tokens_are_sampled_in_proportion_to_their_probability():
    probabilities = torch.tensor([0.02, 0.0, 0.68, 0.0001, 0.2999])
    noise = counter_based_uniform(0, 0, [0], 1, DRAWS)[0]
    drawn = inverse_cdf(probabilities.expand(DRAWS, -1), noise)
    assert within_5_sigma(drawn.bincount(minlength=5), probabilities.double())


# Sampling from a policy whose completions can be enumerated


@pytest.mark.parametrize(
    ("vocabulary", "length", "temperature", "draws"), [(4, 3, 1.0, DRAWS), (5, 2, 0.7, DRAWS // 5)]
)
def test_completions_are_sampled_in_proportion_to_their_probability(vocabulary, length, temperature, draws):
    policy = make_policy(vocabulary)
    prompts, every = make_prompts([2, 1]), every_completion(vocabulary, length)
    given = make_completions(policy, prompts, [every])
    logprobs = policy.logprobs(prompts, given, temperature)[0].sum(-1)
    torch.testing.assert_close(logprobs.exp().sum().item(), 1.0, atol=1e-12, rtol=0)
    sampling = Sampling(max_new_tokens=length, temperature=temperature)
    drawn = policy.sample(prompts, draws, sampling)
    place = {y: i for i, y in enumerate(every)}
    places = torch.tensor([place[tuple(ids)] for ids in drawn.ids()])
    assert within_5_sigma(places.bincount(minlength=len(every)), logprobs.detach().exp())
    torch.testing.assert_close(drawn.logprobs[0].sum(-1), logprobs.detach()[places], atol=1e-9, rtol=0)
    assert torch.equal(drawn.finished[0], torch.tensor([ids[-1] == EOS for ids in drawn.ids()]))


def step_distribution(policy, prompt: list[int], prefix: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (policy.causal_lm(torch.tensor([[*prompt, *prefix]])).logits[0, -1] / temperature).softmax(-1)


@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}, {"min_new_tokens": 2}, {"min_new_tokens": 3}]
)
def test_truncated_sampling_keeps_logprobs_of_the_full_softmax(options):
    """Tokens are sampled from the kept ones, in proportion to their probability."""
    prompt, temperature = [3, 1, 2], 0.8
    policy = make_policy(5, spread=0.3)
    sampling = Sampling(max_new_tokens=3, temperature=temperature, **options)
    drawn = policy.sample(make_prompts(prompt), 20_000, sampling)
    assert sampling.truncates
    scored = policy.logprobs(make_prompts(prompt), drawn, temperature)
    torch.testing.assert_close(drawn.logprobs, scored.detach(), atol=1e-9, rtol=0)
    prefix: list[int] = []
    for t in range(3):
        full = step_distribution(policy, prompt, prefix, temperature)
        kept = truncate(full, t, **options)
        here = drawn.mask[0, :, t] & (drawn.tokens[0, :, :t] == torch.tensor(prefix, dtype=torch.long)).all(-1)
        counts = drawn.tokens[0, here, t].bincount(minlength=5)
        torch.testing.assert_close(drawn.sampled_mass[0, here, t], kept.sum().expand(int(here.sum())))
        assert counts.sum() > 200 and within_5_sigma(counts, kept / kept.sum())
        prefix.append(1 + int(counts[1:].argmax()))


def truncate(probabilities, t: int, top_k: int = 0, top_p: float = 1.0, min_new_tokens: int = 0) -> torch.Tensor:
    """The definition of each option, token by token; top-p applies after top-k."""
    kept = probabilities.clone()
    if t < min_new_tokens:
        kept[EOS] = 0
    order = kept.argsort(descending=True)
    if top_k:
        kept[order[top_k:]] = 0
    share = 0.0
    total = kept.sum()
    for token in order:
        if share >= top_p:
            kept[token] = 0
        share += float(probabilities[token] / total)
    return kept


def test_without_truncation_there_is_no_sampled_mass():
    policy = make_policy(4)
    assert policy.sample(make_prompts([1]), 2, Sampling(max_new_tokens=2)).sampled_mass is None


def test_greedy_takes_the_most_likely_token_and_respects_min_new_tokens():
    policy = make_policy(4)
    drawn = policy.sample(make_prompts([3, 3]), 1, Sampling(max_new_tokens=3, min_new_tokens=3, greedy=True))
    prefix: list[int] = []
    for token in drawn.ids()[0]:
        probabilities = step_distribution(policy, [3, 3], prefix)
        assert token == 1 + int(probabilities[1:].argmax())
        prefix.append(token)
    assert len(prefix) == 3


# The end of a completion


@pytest.fixture(scope="module")
def policy():
    tokenizer = make_tokenizer()
    return Policy(make_llama(len(tokenizer), initializer_range=0.1), tokenizer)


def prompts_of(*lengths: int, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return make_prompts(*[torch.randint(7, 263, (length,), generator=generator).tolist() for length in lengths])


def by_prefix(short: list[int], long: list[int]) -> bool:
    return long[: len(short)] == short


def test_several_eos_ids_end_a_completion_and_are_part_of_it():
    model = make_llama(len(make_tokenizer()))
    model.generation_config.eos_token_id = [2, 100, 101]
    model.config.eos_token_id = list(range(102, 130))
    policy = Policy(model, make_tokenizer())
    assert policy.eos_ids == [2, *range(100, 130)]
    drawn = policy.sample(prompts_of(3, 5), 16, Sampling(max_new_tokens=12))
    for ids, finished in zip(drawn.ids(), drawn.finished.flatten().tolist(), strict=True):
        assert not set(ids[:-1]) & set(policy.eos_ids)
        assert (ids[-1] in policy.eos_ids) == finished
        assert finished or len(ids) == 12
    assert 0 < drawn.finished.sum() < 32
    assert len({ids[-1] for ids, f in zip(drawn.ids(), drawn.finished.flatten(), strict=True) if f}) > 1


def test_the_mask_does_not_depend_on_token_ids(policy):
    """Padding has an id, too, and a prompt may contain EOS."""
    prompts = make_prompts([2, 50, 2, 60], [2])
    drawn = policy.sample(prompts, 3, Sampling(max_new_tokens=5))
    assert (drawn.lengths >= 1).all()
    assert torch.equal(drawn.mask, torch.arange(drawn.mask.shape[-1]) < drawn.lengths.unsqueeze(-1))
    assert (drawn.logprobs[~drawn.mask] == 0).all()


def test_a_stop_string_ends_a_completion_where_it_first_appears(policy):
    prompts, tokenizer = prompts_of(4, 2), policy.tokenizer
    free = policy.sample(prompts, 32, Sampling(max_new_tokens=16), seed=1)
    text = "\n".join(tokenizer.batch_decode(free.ids()))
    pairs = [a + b for a, b in itertools.pairwise(text) if (a + b).isascii() and (a + b).isprintable()]
    stops = [pairs[0], pairs[-1][1]]
    stopped = policy.sample(prompts, 32, Sampling(max_new_tokens=16, stop=stops), seed=1)
    for ids, whole, finished in zip(stopped.ids(), free.ids(), stopped.finished.flatten().tolist(), strict=True):
        assert by_prefix(ids, whole)
        text, before = tokenizer.decode(ids), tokenizer.decode(ids[:-1])
        assert not any(stop in before for stop in stops)
        assert finished == (any(stop in text for stop in stops) or ids[-1] == 2)
        assert finished or len(ids) == 16
    assert any(tokenizer.decode(ids).endswith(pairs[0]) for ids in stopped.ids())
    assert any(tokenizer.decode(ids).endswith(stops[1]) for ids in stopped.ids())


# Independent of the batch


def assert_alike(a, b) -> None:
    assert a.ids() == b.ids()
    length = min(a.tokens.shape[-1], b.tokens.shape[-1])
    torch.testing.assert_close(a.logprobs[..., :length], b.logprobs[..., :length], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.entropy[..., :length], b.entropy[..., :length], atol=1e-5, rtol=0)
    assert torch.equal(a.finished, b.finished)


@pytest.fixture(scope="module")
def ending_policy():
    """A policy whose completions have very different lengths."""
    model = make_llama(len(make_tokenizer()), initializer_range=0.1)
    model.generation_config.eos_token_id = list(range(2, 40))
    return Policy(model, make_tokenizer())


SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)


def test_completions_do_not_depend_on_the_batch(ending_policy):
    prompts = prompts_of(3, 9, 1, 6, 5)
    together = ending_policy.sample(prompts, 3, SAMPLING, seed=5, epoch=2)
    assert together.lengths.unique().numel() > 3
    for i in range(5):
        alone = ending_policy.sample(prompts.rows(slice(i, i + 1)).trim(), 3, SAMPLING, seed=5, epoch=2)
        assert_alike(alone, together.rows(slice(i, i + 1)))


def test_completions_do_not_depend_on_the_order(ending_policy):
    prompts, order = prompts_of(3, 9, 1, 6), torch.tensor([2, 0, 3, 1])
    together = ending_policy.sample(prompts, 3, SAMPLING)
    shuffled = ending_policy.sample(prompts.map(lambda t: t[order]), 3, SAMPLING)
    assert_alike(shuffled, together.map(lambda t: t[order]))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_completions_do_not_depend_on_the_batch_size_of_decoding(ending_policy, size):
    prompts = prompts_of(3, 9, 1, 6, 5)
    in_parts = Sampling(**{**vars(SAMPLING), "batch_size": size, "top_k": 150})
    at_once = Sampling(**{**vars(SAMPLING), "top_k": 150})
    expected, parts = (ending_policy.sample(prompts, 3, sampling) for sampling in (at_once, in_parts))
    assert_alike(parts, expected)
    torch.testing.assert_close(parts.sampled_mass, expected.sampled_mass, atol=1e-5, rtol=0)


def test_more_samples_and_more_tokens_start_with_the_same_ones(ending_policy):
    prompts = prompts_of(3, 9)
    few = ending_policy.sample(prompts, 2, Sampling(max_new_tokens=4))
    many = ending_policy.sample(prompts, 5, Sampling(max_new_tokens=9))
    for i in range(2):
        for j in range(2):
            assert by_prefix(few.ids()[i * 2 + j], many.ids()[i * 5 + j])


def test_the_seed_and_the_epoch_change_the_completions(ending_policy):
    prompts = prompts_of(3, 9)
    drawn = [ending_policy.sample(prompts, 4, SAMPLING, seed, epoch).ids() for seed, epoch in [(0, 0), (1, 0), (0, 1)]]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_sampling_does_not_change_the_mode_or_the_global_generator(ending_policy):
    ending_policy.train()
    before = torch.get_rng_state()
    drawn = ending_policy.sample(prompts_of(3), 2, SAMPLING)
    assert ending_policy.training and torch.equal(torch.get_rng_state(), before)
    assert not drawn.logprobs.requires_grad


# Nothing is computed twice


@pytest.fixture
def embedded(ending_policy):
    """The number of tokens of each forward pass: `(rows, columns)`."""
    ending_policy.probe()
    shapes: list[tuple[int, int]] = []
    embedding = ending_policy.causal_lm.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    yield shapes
    handle.remove()


def test_finished_rows_leave_the_batch_and_the_prompt_is_computed_once(ending_policy, embedded):
    prompts, k = prompts_of(3, 9, 6), 4
    drawn = ending_policy.sample(prompts, k, SAMPLING)
    lengths = drawn.lengths.flatten()
    assert embedded[0] == (3, 9)
    alive = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    assert embedded[1:] == [(rows, 1) for rows in alive]
    assert alive[-1] < len(lengths)
    assert sum(rows * columns for rows, columns in embedded) == 3 * 9 + int((lengths - 1).sum())


def test_padding_that_all_rows_share_is_not_computed(ending_policy, embedded):
    prompts = prompts_of(3, 9)
    ending_policy.sample(prompts.rows(slice(0, 1)), 2, SAMPLING)
    assert embedded[0] == (1, 3)


@pytest.mark.parametrize("scorer", ["policy", "reference"])
def test_scoring_computes_the_prompt_once(ending_policy, embedded, scorer):
    prompts, k = prompts_of(3, 9, 6), 4
    drawn = ending_policy.sample(prompts, k, SAMPLING)
    reference = Reference.of(ending_policy)
    shapes = embedded
    if scorer == "reference":
        copied = reference._policy.causal_lm.get_input_embeddings()
        shapes = []
        copied._forward_hooks.clear()
        copied.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    shapes.clear()
    {"policy": ending_policy, "reference": reference}[scorer].logprobs(prompts, drawn)
    assert shapes == [(3, 9), (3 * k, drawn.tokens.shape[-1] - 1)]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_diverged_policy_raises_an_error(greedy):
    policy = make_policy(8)
    with torch.no_grad():
        policy.causal_lm.lm_head.weight.fill_(torch.nan)
    policy.model_forward.shares_prompt = policy.model_forward.head_apart = True  # probed before it diverged
    with pytest.raises(ValueError, match=r"not finite .* lower the learning rate"):
        policy.sample(make_prompts([5, 6]), 2, Sampling(max_new_tokens=3, greedy=greedy))
