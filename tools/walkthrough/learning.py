"""Sections 7 to 11: through the model, to the losses of pre-training and of preferences."""

from types import SimpleNamespace

import torch

from align import PLAN, Pair, Shift, answer_logprobs, mpo_loss, pair_samples
from common.conversation import text_of
from data import pack
from model import (
    SCALE,
    Attention,
    DecoderLayer,
    KeyeVL,
    Projector,
    cross_entropy_sum,
    merge_order,
)
from pretrain import SigLIP, captions_of, next_token, sigmoid_loss, text_tower
from tools.walkthrough.page import CFG, Walk, num, nums
from vit import ViT, neighbours


@torch.no_grad()
def vit(w: Walk):
    model, batch = w.model.vit, w.batch
    grids = batch["grids"].tolist()
    w.features = model(batch["patches"], batch["grids"])  # (N, C)
    w.say(f"""
        ## 7. The ViT

        All patches of the pack go through at once. A patch becomes {CFG.vision.hidden_size} numbers
        by one linear layer; added is a table of 27 x 27 learned positions, stretched to each grid;
        {CFG.vision.num_hidden_layers} blocks follow, in which a patch sees its own picture, or
        all frames of its clip: segments of {model.lengths(grids)} patches.
    """)
    w.quote(ViT.forward, "x = self.patch_embedding", "x = x + self.positions",
            "for i, layer", "x = layer(", "return self.post_layernorm")
    w.quote(neighbours, "corners =", "shares =", "return")
    pixels = batch["patches"][w.dot].float() / 127.5 - 1
    rows = [["first three channels of patch " + str(w.dot), "values"]]
    rows.append(["embedded", nums(model.patch_embedding(pixels)[:3])])
    rows.append(["its position", nums(model.positions(grids)[w.dot, :3])])
    rows.append(["feature, after the blocks", nums(w.features[w.dot, :3])])
    w.table(*rows)
    alone = model(w.samples[0]["patches"], w.samples[0]["grids"])
    w.say(f"""
        Features are {tuple(w.features.shape)}. Without the clip beside it, the picture's differ by
        {num((w.features[: len(alone)] - alone).abs().max())}: samples never see each other.
    """)


@torch.no_grad()
def merge(w: Walk):
    w.say("""
        ## 8. Four patches become one token

        The projector puts the features of 2x2 neighbours side by side, and two linear layers make
        of them one embedding of the decoder.
    """)
    w.quote(merge_order, "side_by_side =", "return")
    w.quote(Projector.forward, "x = x.view", "return")
    visual = w.model.projector(w.features, w.batch["grids"])  # (N / 4, C)
    order = merge_order(tuple(w.batch["grids"][0].tolist()), 2).ravel()
    w.say(f"""
        The picture's first token is made of patches {order[:4].tolist()}, its second of
        {order[4:8].tolist()}. {len(w.features)} features of {w.features.shape[1]} numbers become
        {len(visual)} tokens of {visual.shape[1]}. They take the placeholders' places among the
        embedded words; from here on the decoder treats all tokens alike:
    """)
    w.quote(KeyeVL.embed, "holes =", "return x.masked_scatter")
    hidden = w.model.hidden(w.batch)
    w.say(f"""
        The decoder's {CFG.num_hidden_layers} layers leave hidden states {tuple(hidden.shape)}; the
        head, here the table of embeddings itself, makes {CFG.vocab_size} logits of each.
    """)
    w.quote(DecoderLayer.forward, "x = x +", "return")
    w.quote(Attention.forward, "q = self.q_proj", "q = rotate", "out = attend", "return")


@torch.no_grad()
def loss(w: Walk):
    summed, n = w.model.loss(w.batch)
    parts = [w.model.loss(pack([sample])) for sample in w.samples]
    w.say("""
        ## 9. The loss

        Only tokens with a label meet the vocabulary. Their cross entropies are summed, and divided
        by the number of labels in the whole step, on all ranks: every target weighs the same.
    """)
    w.quote(KeyeVL.supervised, "labelled = (batch", "return")
    w.quote(cross_entropy_sum, "return F.cross_entropy")
    w.quote(next_token, "targets =", "micro_loss =")
    logp, _ = w.model.logprobs(w.batch)
    labels = w.batch["labels"][w.batch["labels"] != -100].tolist()
    rows = [["label", "-log p"]]
    rows += [[f"`{w.text([label])}`", num(-lp)] for label, lp in zip(labels, logp)]
    w.table(*rows)
    w.say(f"""
        Summed {num(summed)} over {n} labels, {num(summed / n)} each; guessing evenly would be
        log {CFG.vocab_size} = {num(torch.tensor(CFG.vocab_size).log())}. A pack of the picture
        alone gives {num(parts[0][0])}, of the clip alone {num(parts[1][0])}: together the same.
    """)


@torch.no_grad()
def contrastive(w: Walk):
    records = [w.record("scene", i, "pairs") for i in (0, 1, 2)]
    torch.manual_seed(1)
    model = KeyeVL.shapes(CFG, pooling_head=True).to_empty(device="cpu").init_weights()
    tower, encode = text_tower(SimpleNamespace(init_vit=None), CFG, w.processor)
    siglip = SigLIP(model.vit, tower.to_empty(device="cpu"))
    siglip.init_weights(pooling_head=True)
    batch = pack([w.processor(record, w.folder) for record in records])
    ids = captions_of(batch, tower.context, encode)
    images, texts, scale, bias = siglip(batch["patches"], batch["grids"], ids)
    w.say("""
        ## 10. A contrastive pair

        Stage 0 trains the ViT beside a text tower: a picture and its caption shall have like
        vectors, a picture and another's caption unlike ones. Three pictures and captions:
    """)
    w.show(*[record["messages"][1]["content"] for record in records])
    w.quote(SigLIP.forward, "images =", "texts =")
    w.quote(sigmoid_loss, "sign = 2 *", "logits =", "total = total -")
    w.say(f"""
        Vectors {tuple(images.shape)} and {tuple(texts.shape)}; scale t = {num(scale)},
        bias b = {num(bias)}: at the start most pairs are taken for strangers, as most are. Products
        of picture (row) and caption (column):
    """)
    rows = [[f"picture {i + 1}", *map(num, row)] for i, row in enumerate(images @ texts.T)]
    w.table(["", *[f"caption {i + 1}" for i in range(3)]], *rows)
    value = sigmoid_loss(images, texts, scale, bias, 3)
    one = sigmoid_loss(images[:1], texts[:1], scale, bias, 1)
    w.say(f"""
        The first picture with its own caption alone costs {num(one)}; all nine pairs
        {num(value)}, and a picture on average {num(value / 3)}.
    """)


def preference(w: Walk):
    record = w.record("behaviour", 1, "preferences", 2)
    batch = pack(pair_samples(w.processor, Pair(record, w.folder, ""), SCALE["toy"].pack))
    with torch.no_grad():
        reference = answer_logprobs(w.model, batch)[0].view(1, 2)

    def compared(model):
        sums, lengths = answer_logprobs(model, batch)  # (2,) each
        policy, nll = sums.view(1, 2), -sums[:1] / lengths[:1]
        return policy, mpo_loss(policy, reference, nll, Shift().value())

    w.say("""
        ## 11. A preference pair

        Two answers to one question, of which one is better. Both are read as samples of one pack,
        picture and all, and count by how much likelier each is than under the reference, the model
        at the start.
    """)
    w.show(
        text_of(record["messages"][0]),
        f"chosen:   {record['chosen']}",
        f"rejected: {record['rejected']}",
    )
    w.quote(mpo_loss, "rewards =", "margin =", "dpo =", "bco =", "total =")
    later = w.moved(PLAN["toy"]["lr"], lambda model: compared(model)[1]["total"].sum())
    with torch.no_grad():
        states = [compared(model) for model in (w.model, later)]
    columns = [["at the start"], ["after one step"]]
    for column, (policy, parts) in zip(columns, states):
        losses = [parts[key][0] for key in ("margin", "dpo", "bco", "sft", "total")]
        column += map(num, [*policy[0], *parts["rewards"][0], *losses])
    names = "|log p of chosen|log p of rejected|reward of chosen|reward of rejected|margin|dpo|bco"
    w.table(*zip(f"{names}|sft: -log p of a chosen token|total".split("|"), *columns))
    w.say("""
        At the start policy and reference are one: both rewards are 0, dpo is log 2, bco twice that.
        One step of the optimizer ([common/optim.py](../common/optim.py), `make_optimizer`) moves
        them apart. `shift` is the mean of all rewards so far, 0 here.
    """)
