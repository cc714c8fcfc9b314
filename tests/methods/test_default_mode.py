"""The objectives that users train, term by term and switch by switch, against loops written from the papers."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import Views
from declip_cli.errors import ConfigError
from declip_cli.methods.registry import METHODS
from declip_cli.model.text_transformer import END_ID
from declip_cli.train.grad_cache import forward_backward
from declip_cli.train.launch import start_processes
from tests.methods import reference_loops as loops
from tests.methods.small_methods import (
    GOOD,
    QUEUE_SIZE,
    RANK_JOBS,
    batch_of,
    build,
    draw,
    earlier_texts,
    only,
    run_ranks,
    score,
)

ZERO_GRADIENT = 1e-10
WEIGHTS = {
    "clip": {"clip": 1.0},
    "slip": {"clip": 1.0, "simclr": 1.0},
    "filip": {"filip": 1.0, "clip": 0.0},
    "declip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2},
    "defilip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2, "filip": 0.2},
    "rocket": {"clip": 1 / 3, "strong": 2 / 3},
    "aclip": {"clip": 1.0, "simclr": 1.0, "byol": 2.0},
}
NEIGHBORS_ONLY = only("declip", nn=1.0)
CASES = [
    ("clip", {}),
    ("clip", {"label_smoothing": 0.1}),
    ("clip", {"cap_logit_scale": True}),
    ("slip", {}),
    ("slip", {"label_smoothing": 0.1}),
    ("slip", {"weights": only("slip", clip=0.7)}),
    ("slip", {"weights": only("slip", simclr=0.7)}),
    ("slip", {"weights": only("slip", simclr=1.0), "simclr_temperature": 0.5}),
    ("filip", {}),
    ("filip", {"token_wise_top_k": 2}),
    ("filip", {"token_wise_top_k": 2, "label_smoothing": 0.1}),
    ("filip", {"weights": {"clip": 0.5}, "label_smoothing": 0.1}),
    ("filip", {"weights": only("filip", clip=1.0)}),
    ("declip", {}),
    ("declip", {"pairs": 1}),
    ("declip", {"pairs": 2}),
    ("declip", {"label_smoothing": 0.1}),
    ("declip", {"weights": only("declip", clip=1.0)}),
    ("declip", {"weights": only("declip", simsiam=1.0)}),
    ("declip", {"weights": only("declip", mlm=1.0)}),
    ("declip", {"weights": NEIGHBORS_ONLY, "nn_symmetric": False, "nn_exclude_own": False}),
    ("declip", {"weights": NEIGHBORS_ONLY, "nn_symmetric": False, "nn_exclude_own": True}),
    ("declip", {"weights": NEIGHBORS_ONLY, "nn_symmetric": True, "nn_exclude_own": False}),
    ("declip", {"weights": NEIGHBORS_ONLY, "nn_symmetric": True, "nn_exclude_own": True}),
    ("declip", {"weights": NEIGHBORS_ONLY, "queue_start": "random", "nn_exclude_own": False}),
    ("declip", {"weights": NEIGHBORS_ONLY, "queue_start": "random", "nn_exclude_own": True}),
    ("defilip", {}),
    ("defilip", {"pairs": 1, "token_wise_top_k": 2, "label_smoothing": 0.1}),
    ("defilip", {"nn_symmetric": False, "nn_exclude_own": True}),
    ("defilip", {"weights": only("defilip", filip=1.0)}),
    ("declip", {"weights": {"simsiam": 0.0, "simclr": 0.2}}),
    ("declip", {"weights": only("declip", simclr=0.7), "simclr_temperature": 0.5}),
    ("defilip", {"weights": only("defilip", simclr=0.7)}),
    ("rocket", {}),
    ("rocket", {"label_smoothing": 0.2, "strong_label_smoothing": 0.0}),
    ("rocket", {"weights": only("rocket", clip=1.0)}),
    ("rocket", {"weights": only("rocket", strong=1.0)}),
    ("aclip", {}),
    *(("aclip", {"weights": only("aclip", **{term: 0.7})}) for term in ("clip", "simclr", "byol")),
    *((name, {"weights": {"words": 0.5}}) for name in METHODS),
    *((name, {"positives": "caption", "label_smoothing": 0.1}) for name in METHODS),
    *((name, {"captions": 2}) for name in ("clip", "slip", "declip", "rocket", "aclip")),
]


def views_of(name, *, captions=1, pairs=4, **options):
    """Count the images and texts that the term `clip` compares."""
    if name in ("declip", "defilip"):
        return {1: (1, 1), 2: (2, 1), 4: (2, max(2, captions))}[pairs]
    return (2 if name == "aclip" else 1, captions if name in ("clip", "slip", "aclip") else 1)


def expected_of_images(active, fields, head, *, simclr_temperature=0.1, batch_norm="global", **options):
    """Compute the active terms that images have by themselves."""
    terms, features = {}, fields.get("image_features")
    if active.get("simclr"):
        norm_size = 3 if batch_norm == "rank" else None
        terms["simclr"] = loops.nt_xent(features, head["simclr_head"], simclr_temperature, norm_size=norm_size)
    if active.get("simsiam"):
        terms["simsiam"] = loops.simsiam(fields["images"], head["projector"], head["predictor"])
    if active.get("byol"):
        terms["byol"] = loops.byol(features, head["projector"], head["predictor"], head["teacher.head"])
    return terms


def expected_terms(name, fields, parameters, *, queue, **options):
    """Compute each active term from float64 fields and parameters; `queue`: rows and numbers, or None while empty."""
    scale, smoothing = parameters["encoder.logit_scale"].exp(), options.get("label_smoothing", 0.0)
    active = WEIGHTS[name] | options.get("weights", {})
    head = {
        part: {key.removeprefix(f"{part}."): value for key, value in parameters.items() if key.startswith(f"{part}.")}
        for part in ("simclr_head", "projector", "predictor", "image_head", "text_head", "teacher.head")
    }
    images, texts = fields["images"], fields["texts"]
    captions = fields["caption_ids"].tolist() if options.get("positives") == "caption" else None
    terms = {}
    if active.get("clip"):
        views = views_of(name, **options)
        terms["clip"] = loops.clip(images, texts, scale, views=views, smoothing=smoothing, captions=captions)
    terms |= expected_of_images(active, fields, head, **options)
    if active.get("mlm"):
        terms["mlm"] = loops.mlm(list(fields["mlm_losses"]), fields["mlm_counts"].tolist())
    if active.get("nn"):
        terms["nn"] = torch.zeros((), dtype=torch.float64)
        if queue is not None:
            rows, row_pairs = list(queue[0].double()), queue[1].tolist()
            pair_indices = fields["pair_indices"].tolist() if options.get("nn_exclude_own") else None
            symmetric = options.get("nn_symmetric", True)
            options_of_nn = {"is_symmetric": symmetric, "pair_indices": pair_indices, "row_pairs": row_pairs}
            terms["nn"] = loops.nn(images, texts, rows, scale, **options_of_nn, captions=captions)
    if active.get("filip"):
        parts = fields["image_tokens"], fields["text_tokens"], fields["text_token_mask"]
        dense, top_k = parameters["logit_scale_dense"].exp(), options.get("token_wise_top_k", 16)
        terms["filip"] = loops.filip(*parts, dense, top_k=top_k, smoothing=smoothing, captions=captions)
    if active.get("strong"):
        terms["strong"] = loops.rocket_strong(
            fields["image_features"],
            fields["text_features"],
            head["image_head"],
            head["text_head"],
            parameters["logit_scale_strong"].exp(),
            smoothing=options.get("strong_label_smoothing", 0.1),
            captions=captions,
        )
    if active.get("words"):
        terms["words"] = loops.mean(list(fields["word_losses"]))
    return terms


def total_of(name, terms, weights):
    return sum((WEIGHTS[name] | weights)[key] * term for key, term in terms.items())


def doubles(values):
    """Copy into float64, with a gradient where there can be one."""
    return {
        key: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for key, value in values.items()
    }


def assert_same_gradients(found, expected):
    for key, value in expected.items():
        wanted = torch.zeros_like(value) if value.grad is None else value.grad
        gradient = found.get(key, torch.zeros_like(wanted)).double()
        # Biases before a BatchNorm have zero gradient; what float32 finds there is rounding noise.
        allowed = 1e-4 * wanted.norm() if wanted.norm() > ZERO_GRADIENT else 1e-4
        assert (gradient - wanted).norm() <= allowed, key
    assert set(found) <= set(expected)


def queue_of(method, fields, state="filled"):
    """Fill a method's queue with earlier texts; return what it holds, or None if it is empty or not there."""
    if not hasattr(method, "queue"):
        return None
    if state == "filled":
        rows, pair_indices = earlier_texts(fields)
        method.queue.push(rows[:13], pair_indices[:13], GOOD)
    num_filled = int(method.queue.num_filled)
    return (method.queue.rows[:num_filled], method.queue.pair_indices[:num_filled]) if num_filled else None


def check(name, fields, *, state="filled", **options):
    """Compare terms, total and every gradient of a method with the loops; return the terms."""
    method = build(name, **options)
    queue = queue_of(method, fields, state)
    terms, total, gradients = score(method, fields)
    ours = {key: value for key, value in method.named_parameters() if not key.startswith(("encoder.v", "encoder.te"))}
    expected_fields, weights = doubles(fields), doubles(ours)
    expected = expected_terms(name, expected_fields, weights, queue=queue, **options)
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(
        {key: term.item() for key, term in expected.items()}, rel=1e-5, abs=1e-6
    )
    whole = total_of(name, expected, options.get("weights", {}))
    assert total.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)
    if whole.requires_grad:
        whole.backward()
    expected_gradients = {k: v for k, v in (expected_fields | weights).items() if v.requires_grad}
    assert_same_gradients(gradients, expected_gradients)
    return {key: term.item() for key, term in terms.items()}


def case_name(value):
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_name)
def test_terms_and_gradients_equal_the_loops(name, options):
    check(name, draw(), **options)


@pytest.mark.parametrize("name", ["declip", "defilip"])
def test_an_empty_queue_makes_the_neighbors_term_zero(name):
    neighbors = {"weights": only(name, nn=1.0)}
    assert check(name, draw(), state="empty", **neighbors)["nn"] == 0.0
    assert check(name, draw(), state="empty", queue_start="random", **neighbors)["nn"] > 0.0


def test_a_queue_that_starts_at_random_is_full_of_directions():
    queue = build("declip", queue_start="random").queue
    assert queue.count() == QUEUE_SIZE
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(QUEUE_SIZE))
    assert build("declip", queue_start="empty").queue.count() == 0


def test_leaving_out_the_own_pair_changes_the_neighbors():
    fields = draw()
    values = [
        check("declip", fields, weights=NEIGHBORS_ONLY, nn_exclude_own=is_excluded)["nn"]
        for is_excluded in (False, True)
    ]
    assert abs(values[0] - values[1]) > 0.01


def test_a_batch_without_masked_tokens_has_a_masked_language_loss_of_zero():
    fields = draw()
    fields["mlm_losses"], fields["mlm_counts"] = torch.zeros(4), torch.zeros(4)
    assert check("declip", fields)["mlm"] == 0.0


@pytest.mark.parametrize("is_capped", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_logit_scale_is_capped_at_100_with_the_whole_gradient(name, is_capped):
    weights = only(name, clip=1.0)
    method, fields = build(name, cap_logit_scale=is_capped, weights=weights), draw()
    with torch.no_grad():
        method.encoder.logit_scale.fill_(math.log(150))
    terms, _, gradients = score(method, fields)
    # The original's SLIP and FILIP have no cap.
    value = 100.0 if is_capped and name in ("clip", "declip", "defilip") else 150.0
    scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    expected = loops.clip(fields["images"].double(), fields["texts"].double(), scale, views=views_of(name))
    expected.backward()
    assert terms["clip"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradients["encoder.logit_scale"].item() == pytest.approx(150 * scale.grad.item(), rel=1e-4)


def encoded(method, batch, *, score_padding):
    """Compute a method's embeddings one view at a time, with the encoder's own functions; in float64."""
    encoder, first = method.encoder, batch.tokens[:, 0]
    views = range(batch.images.shape[1])
    fields = {
        "images": torch.stack([encoder.encode_image(batch.images[:, view]) for view in views], 1),
        "texts": torch.stack([encoder.encode_text(batch.tokens[:, t]) for t in range(batch.tokens.shape[1])], 1),
    }
    if method.config.name == "slip":
        features = [encoder.encode_image(batch.images[:, view], projected=False) for view in views]
        fields["image_features"] = torch.stack(features[1:], 1)
        fields["images"] = fields["images"][:, :1]
    if method.config.name == "rocket":
        features = [encoder.encode_image(batch.images[:, view], projected=False) for view in views]
        fields["image_features"] = torch.stack(features[1:], 1)
        states = [encoder.text(batch.tokens[:, t]) for t in (1, 2)]
        features = [encoder.text.pool_at_end(states[t - 1], batch.tokens[:, t]) for t in (1, 2)]
        fields["text_features"] = torch.stack(features, 1)
        fields["images"], fields["texts"] = fields["images"][:, :1], fields["texts"][:, :1]
    if method.config.name == "aclip":
        chosen = method.prepare(batch, size=len(batch))
        states = [encoder.image_states(batch.images[:, view], chosen.kept_patches[:, view]) for view in (0, 1)]
        fields["images"] = torch.stack([encoder.project_image(view) for view in states], 1)
        fields["image_features"] = torch.stack([*(view.features for view in states), chosen.whole_features], 1)
    if getattr(method, "simclr_head", None) is not None and method.config.name == "declip":
        features = [encoder.encode_image(batch.images[:, view], projected=False) for view in views]
        fields["image_features"] = torch.stack(features, 1)
    if method.mlm_head is not None:
        weight, bias = method.mlm_head.weight.double(), method.mlm_head.bias.double()
        states = encoder.text(first).double()
        sums = [loops.masked_sum(*text, weight, bias) for text in zip(states, batch.mlm_labels, strict=True)]
        fields["mlm_losses"] = torch.stack([total for total, _ in sums])
        fields["mlm_counts"] = torch.tensor([float(count) for _, count in sums])
    if encoder.token_wise is not None:
        fields["image_tokens"] = encoder.encode_image_tokens(batch.images[:, 0])
        fields["text_tokens"] = encoder.encode_text_tokens(first)[0]
        lengths = [9 if score_padding else tokens.index(END_ID) + 1 for tokens in first.tolist()]
        fields["text_token_mask"] = torch.arange(9) < torch.tensor(lengths)[:, None]
    fields = {key: value.double() if value.is_floating_point() else value for key, value in fields.items()}
    return fields | {"pair_indices": batch.pair_indices, "caption_ids": batch.caption_ids}


TOWER_CASES = [
    *((name, {"token_wise_top_k": 2} if "filip" in name else {}) for name in METHODS),
    *((name, {"score_padding": True, "token_wise_top_k": 2}) for name in ("filip", "defilip")),
    ("declip", {"pairs": 1}),
    ("declip", {"pairs": 2, "nn_exclude_own": True}),
    ("declip", {"weights": {"simsiam": 0.0, "simclr": 0.2}}),
    *((name, {"captions": 3, "positives": "caption"}) for name in ("clip", "slip", "declip", "defilip", "rocket")),
]


@pytest.mark.parametrize(("name", "options"), TOWER_CASES, ids=case_name)
def test_the_objective_through_the_towers_equals_the_loops(name, options):
    method = build(name, **options)
    batch = batch_of(method)
    queue = queue_of(method, draw())
    found = method.objective(method.embed(batch))
    found.total.backward()
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    fields = encoded(method, batch, score_padding=options.get("score_padding", False))
    weights = {key: p.double() for key, p in method.named_parameters()}
    terms = expected_terms(name, fields, weights, queue=queue, **options)
    assert {key: term.item() for key, term in found.terms.items()} == pytest.approx(
        {key: term.item() for key, term in terms.items()}, rel=1e-5, abs=1e-6
    )
    total_of(name, terms, options.get("weights", {})).backward()
    expected = dict(method.named_parameters())
    assert_same_gradients(gradients, expected)


def test_micro_batches_leave_out_own_captions_too():
    values, gradients = {}, {}
    for is_excluded, size in ((True, 0), (True, 2), (False, 0)):
        method = build("declip", nn_exclude_own=is_excluded)
        batch = batch_of(method)
        with torch.no_grad():
            method.update_queue(method.embed(batch), GOOD)
        result = forward_backward(method, batch, micro_batch_size=size, autocast=nullcontext)
        assert result.embeddings.pair_indices.tolist() == batch.pair_indices.tolist()
        values[is_excluded, size] = result.terms.terms["nn"].item()
        gradients[is_excluded, size] = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    assert values[True, 2] == pytest.approx(values[True, 0], rel=1e-5)
    assert values[False, 0] != pytest.approx(values[True, 0], rel=1e-2)
    for key, whole in gradients[True, 0].items():
        assert (gradients[True, 2][key] - whole).norm() < 2e-4 * whole.norm() + 1e-5, key


@pytest.mark.parametrize(
    ("name", "options", "images", "texts", "pad_to_context"),
    [
        ("clip", {}, ("plain",), ("plain",), False),
        ("slip", {}, ("plain", "augmented", "augmented"), ("plain",), False),
        ("slip", {"weights": {"simclr": 0.0}}, ("plain",), ("plain",), False),
        ("filip", {}, ("augmented",), ("plain",), False),
        ("filip", {"filip_text": "masked"}, ("augmented",), ("masked",), False),
        ("filip", {"score_padding": True}, ("augmented",), ("plain",), True),
        ("clip", {"captions": 3}, ("plain",), ("plain",) * 3, False),
        ("aclip", {"captions": 2}, ("augmented", "augmented", "whole"), ("plain",) * 2, False),
        ("slip", {"captions": 2}, ("plain", "augmented", "augmented"), ("plain",) * 2, False),
        ("declip", {"captions": 2}, ("augmented",) * 2, ("masked", "augmented"), False),
        ("declip", {"captions": 3}, ("augmented",) * 2, ("masked", "augmented", "augmented"), False),
        ("rocket", {"captions": 3}, ("plain", *("augmented",) * 2), ("keywords", *("augmented_keywords",) * 2), False),
        ("declip", {}, ("augmented", "augmented"), ("masked", "augmented"), False),
        ("declip", {"pairs": 2}, ("augmented", "augmented"), ("masked",), False),
        ("declip", {"pairs": 1}, ("augmented", "augmented"), ("masked",), False),
        ("declip", {"pairs": 1, "weights": {"simsiam": 0.0}}, ("augmented",), ("masked",), False),
        ("declip", {"pairs": 1, "weights": {"simsiam": 0, "simclr": 1}}, ("augmented",) * 2, ("masked",), False),
        ("rocket", {}, ("plain", *("augmented",) * 2), ("keywords", *("augmented_keywords",) * 2), False),
        ("rocket", {"weights": {"strong": 0.0}}, ("plain",), ("keywords",), False),
        ("declip", {"pairs": 1, "weights": {"mlm": 0.0}}, ("augmented", "augmented"), ("plain",), False),
        ("defilip", {}, ("augmented", "augmented"), ("masked", "augmented"), False),
        ("defilip", {"score_padding": True}, ("augmented", "augmented"), ("masked", "augmented"), True),
    ],
)
def test_a_method_asks_for_the_views_its_terms_need(name, options, images, texts, pad_to_context):
    assert build(name, **options).views == Views(images=images, texts=texts, pad_to_context=pad_to_context)


@pytest.mark.parametrize(
    ("name", "options", "num_texts"),
    [
        ("filip", {"captions": 2}, 1),
        ("rocket", {"captions": 4}, 3),
        ("declip", {"captions": 2, "pairs": 2}, 1),
        ("rocket", {"captions": 2, "weights": {"strong": 0.0}}, 1),
    ],
)
def test_more_captions_than_texts_are_refused(name, options, num_texts):
    with pytest.raises(
        ConfigError, match=f"method {name} shows at most {num_texts} of a pair's captions here"
    ) as caught:
        build(name, **options)
    assert f"--set method.captions={num_texts}" in caught.value.remedy


def test_without_padding_scored_the_padding_has_no_influence():
    for score_padding in (False, True):
        method = build("filip", score_padding=score_padding)
        batch = batch_of(method)
        other = F.pad(batch.tokens, (0, 2))
        padded = Batch(
            images=batch.images,
            tokens=other,
            mlm_labels=F.pad(batch.mlm_labels, (0, 2)),
            pair_indices=batch.pair_indices,
        )
        totals = [method.objective(method.embed(each)).total.item() for each in (batch, padded)]
        assert (totals[0] == pytest.approx(totals[1], rel=1e-5)) != score_padding


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, quick_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(run_ranks, (str(folder),), num_processes=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def halves(fields):
    return [{key: value[3 * rank : 3 * rank + 3] for key, value in fields.items()} for rank in (0, 1)]


@pytest.mark.parametrize("job", range(len(RANK_JOBS)), ids=lambda job: f"{RANK_JOBS[job][0]}-{job}")
def test_two_ranks_equal_the_loops(ranks, job):
    name, options = RANK_JOBS[job]
    options = options | {"weights": only(name, **options["weights"])} if "weights" in options else options
    method, fields = build(name, **options), doubles(draw(6))
    queue = queue_of(method, draw(6), "as it starts")
    weights = doubles(dict(method.named_parameters()))
    # What only looks at a rank's own pairs is computed rank by rank, all else over the whole batch.
    is_per_rank = name == "declip" and "rank" in (options.get("mlm_mean"), options.get("batch_norm"))
    parts = halves(fields) if is_per_rank else [fields]
    terms = [expected_terms(name, part, weights, queue=queue, **options) for part in parts]
    expected = {key: sum(each[key] for each in terms) / len(terms) for key in terms[0]}
    for key, term in expected.items():
        found = sum(rank[job][f"term/{key}"] for rank in ranks) / 2
        assert found.item() == pytest.approx(term.item(), rel=1e-5, abs=1e-6), key
    total = total_of(name, expected, options.get("weights", {}))
    if total.requires_grad:
        total.backward()
    gradients = {
        # Each rank holds the gradient of the sum over ranks; training takes the mean.
        key: torch.cat([rank[job][f"gradient/{key}"] for rank in ranks]) / 2
        for key in fields
        if f"gradient/{key}" in ranks[0][job]
    }
    assert_same_gradients(gradients, {key: value for key, value in fields.items() if value.requires_grad})


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_a_queue_takes_the_texts_of_all_ranks_or_of_its_own(ranks, scope):
    job = RANK_JOBS.index(("declip", {"weights": {"nn": 1.0}, "queue_scope": scope}))
    fields = draw(6)
    for rank in (0, 1):
        part = fields if scope == "global" else halves(fields)[rank]
        rows = [loops.unit(text) for view in (1, 0) for text in part["texts"][:, view]]  # augmented texts first
        torch.testing.assert_close(ranks[rank][job]["rows"][: len(rows)], torch.stack(rows))
        pair_indices = part["pair_indices"].tolist() * 2
        assert ranks[rank][job]["pair_indices"].tolist() == pair_indices + [-1] * (QUEUE_SIZE - len(pair_indices))


def test_a_global_queue_leaves_out_own_captions_that_another_rank_pushed():
    fields = draw(6)
    method = build("declip", nn_exclude_own=True)
    method.update_queue(Embeddings(**fields), GOOD)  # as after a gather over ranks
    terms, _, _ = score(method, halves(fields)[1])
    queue = (method.queue.rows[:12], method.queue.pair_indices[:12])
    expected = expected_terms(
        "declip",
        doubles(halves(fields)[1]),
        doubles(dict(method.named_parameters())),
        queue=queue,
        nn_exclude_own=True,
        weights=only("declip", nn=0.2),
    )
    assert terms["nn"].item() == pytest.approx(expected["nn"].item(), rel=1e-5)
