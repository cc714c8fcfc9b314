"""The objectives as plain loops over pairs, written from the papers; slow, in float64, on one process.

CLIP arXiv 2103.00020 (fig. 3) · SLIP 2112.12750 · SimCLR 2002.05709 (eq. 1) · FILIP 2111.07783 (eq. 3 to 6) ·
DeCLIP 2110.05208 (section 3) · SimSiam 2011.10566 (algorithm 1) · BERT 1810.04805 · DeFILIP 2203.05796 ·
CLIP:rocket 2305.08675 (section 3) · SuperCLIP 2512.14480 · UniCL 2204.03610 (equation 2) ·
A-CLIP 2212.08653 (section 3) · BYOL 2006.07733 (equation 2).
Nothing here is imported from the package. Numbers are torch scalars, so that gradients come from autograd.
"""

import math

import torch


def unit(vector):
    return vector / vector.square().sum().sqrt()


def units(vectors):
    return [unit(vector) for vector in vectors]


def mean(values):
    return sum(values) / len(values)


def cross_entropy(logits, targets, smoothing=0.0):
    """- sum_k q_k log p_k, where q is 1 - smoothing at the targets, evenly, and smoothing / K more everywhere."""
    targets = targets if isinstance(targets, list) else [targets]
    log_total = torch.logsumexp(torch.stack(logits), 0)
    loss = 0.0
    for k, logit in enumerate(logits):
        wanted = smoothing / len(logits) + ((1 - smoothing) / len(targets) if k in targets else 0.0)
        loss = loss + wanted * (log_total - logit)
    return loss


def same(captions, i, num):
    """Numbers of the pairs that have a caption in common with pair i; captions None: itself."""
    return [i] if captions is None else [j for j in range(num) if set(captions[i]) & set(captions[j])]


def one_way(queries, keys, scale, smoothing=0.0, captions=None):
    """Each query is to be matched with the key of its own number, or those of the same captions."""
    queries, keys = units(queries), units(keys)
    losses = []
    for i, query in enumerate(queries):
        logits = [scale * (query @ key) for key in keys]
        losses.append(cross_entropy(logits, same(captions, i, len(keys)), smoothing))
    return mean(losses)


def both_ways(images, texts, scale, smoothing=0.0, captions=None):
    there, back = ((images, texts), (texts, images))
    return (one_way(*there, scale, smoothing, captions) + one_way(*back, scale, smoothing, captions)) / 2


def clip(images, texts, scale, *, views=(1, 1), smoothing=0.0, captions=None):
    """(B, V, D), (B, T, D); the mean over all pairs of the first so many images and texts."""
    chosen = [(v, t) for v in range(views[0]) for t in range(views[1])]
    return mean([both_ways(images[:, v], texts[:, t], scale, smoothing, captions) for v, t in chosen])


def linear(vector, weights, name):
    return weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"]


def batch_norm(vectors, weights, name):
    """Mean 0 and variance 1 over the batch, then weight and bias."""
    center = mean(vectors)
    variance = mean([(vector - center) ** 2 for vector in vectors])
    normed = [(vector - center) / (variance + 1e-5).sqrt() for vector in vectors]
    return [vector * weights[f"{name}.weight"] + weights[f"{name}.bias"] for vector in normed]


def positive(vectors):
    return [vector.clamp(min=0) for vector in vectors]


def simclr_head(features, weights):
    """Linear, BatchNorm, ReLU, twice; then linear."""
    hidden = positive(batch_norm([linear(x, weights, "linear1") for x in features], weights, "bn1"))
    hidden = positive(batch_norm([linear(x, weights, "linear2") for x in hidden], weights, "bn2"))
    return [linear(x, weights, "linear3") for x in hidden]


def nt_xent(features, weights, temperature, *, norm_size=None):
    """(B, 2, E): of the 2B - 1 other views, the partner is to be told; BatchNorm sees `norm_size` images at once."""
    views = [[], []]
    for part in features.split(norm_size or len(features)):
        for view in (0, 1):
            views[view] += units(simclr_head(list(part[:, view]), weights))
    flat = [(image, view) for image in range(len(features)) for view in (0, 1)]
    losses = []
    for image, view in flat:
        others = [(i, v) for i, v in flat if (i, v) != (image, view)]
        logits = [views[view][image] @ views[v][i] / temperature for i, v in others]
        losses.append(cross_entropy(logits, others.index((image, 1 - view))))
    return mean(losses)


def rocket_strong(image_features, text_features, image_head, text_head, scale, *, smoothing, captions=None):
    """(B, 2, E), (B, 2, F): strong views through heads of their own; each of an image's with each of its text's."""
    images = [simclr_head(list(image_features[:, view]), image_head) for view in (0, 1)]
    texts = [simclr_head(list(text_features[:, view]), text_head) for view in (0, 1)]
    return mean([both_ways(image, text, scale, smoothing, captions) for image in images for text in texts])


def words(features, captions, earlier, head):
    """(B, E), sets of ids, batches of such sets: each caption's ids are predicted, weighted by their rarity.

    log((n + 1/B) / (c + 1/B)): n earlier batches of B; c the shares of their captions with the id, added up.
    """
    size = len(earlier[0])
    shares = {}
    for batch in earlier:
        for caption in batch:
            for word in caption:
                shares[word] = shares.get(word, 0.0) + 1 / size
    losses = []
    for feature, caption in zip(features, captions, strict=True):
        centered = feature - feature.mean()
        normed = centered / (centered.square().mean() + 1e-5).sqrt() * head["norm.weight"] + head["norm.bias"]
        logits = {word: head["linear.weight"][word] @ normed + head["linear.bias"][word] for word in shares}
        log_total = torch.logsumexp(torch.stack(list(logits.values())), 0)
        rarity = {w: math.log((len(earlier) + 1 / size) / (shares[w] + 1 / size)) for w in caption if w in shares}
        whole = sum(rarity.values()) or 1.0
        losses.append(sum((rarity[w] / whole * (log_total - logits[w]) for w in rarity), 0 * log_total))
    return losses


def simsiam(images, projector, predictor):
    """(B, 2, D): -1/2 [cos(p1, stop(z2)) + cos(p2, stop(z1))]."""
    z, p = [], []
    for view in (0, 1):
        hidden = positive(batch_norm([linear(x, projector, "linear1") for x in images[:, view]], projector, "bn1"))
        hidden = positive(batch_norm([linear(x, projector, "linear2") for x in hidden], projector, "bn2"))
        z.append(batch_norm([linear(x, projector, "linear3") for x in hidden], projector, "bn3"))
        hidden = positive(batch_norm([linear(x, predictor, "linear1") for x in z[view]], predictor, "bn1"))
        p.append([linear(x, predictor, "layer2") for x in hidden])
    sides = []
    for view, other in ((0, 1), (1, 0)):
        sides.append(-mean([unit(a) @ unit(b.detach()) for a, b in zip(p[view], z[other], strict=True)]))
    return sum(sides) / 2


def byol_head(features, weights):
    """Linear, BatchNorm, ReLU, linear."""
    hidden = positive(batch_norm([linear(x, weights, "linear1") for x in features], weights, "bn1"))
    return [linear(x, weights, "linear2") for x in hidden]


def byol(features, projector, predictor, teacher):
    """(B, 3, E): 2 - 2 cos of what is predicted from the first two views and what the teacher makes of the third."""
    targets = [target.detach() for target in byol_head(list(features[:, 2]), teacher)]
    sides = []
    for view in (0, 1):
        predicted = byol_head(byol_head(list(features[:, view]), projector), predictor)
        sides.append(mean([2 - 2 * (unit(one) @ unit(target)) for one, target in zip(predicted, targets, strict=True)]))
    return mean(sides)


def masked_sum(states, labels, weight, bias):
    """One text: (L, E), (L,): sum and number of the cross-entropies where a token is hidden."""
    losses = [
        torch.logsumexp(weight @ state + bias, 0) - (weight @ state + bias)[label]
        for state, label in zip(states, labels.tolist(), strict=True)
        if label != -100
    ]
    return sum(losses, torch.zeros((), dtype=states.dtype)), len(losses)


def mlm(sums, counts):
    """Mean over all masked tokens of all texts; 0 without any."""
    return sum(sums) / max(1, sum(int(count) for count in counts))


def nearest(query, rows, number=None, row_pairs=None):
    """The row of the largest cosine; rows of the query's own pair do not take part if there is another."""
    allowed = [k for k in range(len(rows)) if number is None or row_pairs[k] != number]
    allowed = allowed or [0]
    return rows[max(allowed, key=lambda k: float(query @ rows[k]))]


def nn(images, texts, rows, scale, *, is_symmetric, pair_indices=None, row_pairs=None, captions=None):
    """(B, V, D), (B, T, D), (R, D): each image with the nearest earlier text of each of its texts."""
    losses = []
    for t in range(texts.shape[1]):
        found = []
        for i in range(len(texts)):
            number = None if pair_indices is None else int(pair_indices[i])
            found.append(nearest(unit(texts[i, t]).detach(), rows, number, row_pairs))
        for v in range(images.shape[1]):
            there = one_way(images[:, v], found, scale, captions=captions)
            back = one_way(found, images[:, v], scale, captions=captions)
            losses.append((there + back) / 2 if is_symmetric else there)
    return mean(losses)


def relevant(tokens, counted, partners, partners_counted, top_k):
    """Numbers of the tokens that are most similar to the other side of their own pair."""
    relevance = {
        k: float(sum(tokens[k].detach() @ partners[r].detach() for r in range(len(partners)) if partners_counted[r]))
        for k in range(len(tokens))
        if counted[k]
    }
    return sorted(relevance, key=relevance.get, reverse=True)[:top_k]


def filip(image_tokens, text_tokens, text_mask, scale, *, top_k, smoothing=0.0, captions=None):
    """(B, P, Q), (B, L, Q), (B, L): tokens that count take their best match; the mean is the pair's score."""
    num = len(image_tokens)
    images = [(units(image_tokens[i]), [True] * image_tokens.shape[1]) for i in range(num)]
    texts = [(units(text_tokens[i]), text_mask[i].tolist()) for i in range(num)]
    sides = []
    for queries, keys in ((images, texts), (texts, images)):
        kept = [relevant(*keys[j], *queries[j], top_k) for j in range(num)]
        losses = []
        for i in range(num):
            tokens, counted = queries[i]
            logits = []
            for j in range(num):
                best = [
                    torch.stack([tokens[k] @ keys[j][0][r] for r in kept[j]]).max()
                    for k in range(len(tokens))
                    if counted[k]
                ]
                logits.append(scale * mean(best))
            losses.append(cross_entropy(logits, same(captions, i, num), smoothing))
        sides.append(mean(losses))
    return sum(sides) / 2
