"""A SentencePiece model as a Hugging Face tokenizer that gives the same ids.

``transformers`` has no loader that reproduces an arbitrary SentencePiece model (its Llama class, for one,
adds no second space to a text that starts with one), so the ``tokenizers`` pipeline is built here from the
model's own specification:

    SentencePiece                                   tokenizers
    precompiled character map, whitespace rules     normalizers
    user-defined symbols, matched first             Split (isolated), then the model
    unigram / BPE, byte fallback, fused unknowns    Unigram / BPE
    control symbols are never read from text        ``split_special_tokens``, and cuts inside their names; read
                                                    where there is a chat template, which writes them

Equal ids were found for unigram and BPE, with and without byte fallback, dummy prefix, user-defined symbols,
and for the identity and nmt_nfkc character maps with extra whitespace removed. Refused: whitespace as suffix,
the word and char models, and whatever the self-check finds to differ (for example a user-defined symbol that
the character map would change). Decoding differs in one point: an unknown piece reads ``<unk>`` here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_groupdpo.errors import DataError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # sentencepiece_model.proto, SentencePiece.Type

_PROBES = (
    "a", " ", "\n", "  a", "a  ", " a b", "a  b   c", "\n\nQ: 12+34=?\nA: 46", "\tindented\n    more\n",
    "0123456789 3.14 -7e9", "Hello, world! It's fine; isn't it?", "naïve café Ünïcödé ß", "日本語のテキスト",
    "🙂 emoji 👩‍👩‍👧", "<s> </s> <unk> <0x0A>", "<pad>x<s>", "▁a", "a▁b", "(1 + 2) * [3] / {4} = <<5>>\n#### 5",
    "aaaaaaaaaaaaaaaa", "the quick brown fox jumps over the lazy dog " * 4, "x\r\ny", "ﬁ ½ Ⅷ", "\u00a0nbsp\u3000wide",
)  # fmt: skip


def export_to_hugging_face(model_file: Path, folder: Path, *, add_bos: bool, chat_template: str | None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` that ``AutoTokenizer`` loads.

    Raises:
        DataError: the model uses a feature outside the module's list, or ids differ on the probe texts.
    """
    processor = SentencePieceProcessor(model_file=str(model_file))
    hugging_face = build_fast_tokenizer(model_file, add_bos=add_bos)
    hugging_face.chat_template = chat_template
    symbols = _user_defined_symbols(_read_proto(model_file))
    for probe in [*_PROBES, *(f"a{symbol}b </s>{symbol}</s>{symbol}\n" for symbol in symbols[:32])]:
        expected = processor.encode(probe)
        got = hugging_face.encode(probe, add_special_tokens=False, split_special_tokens=True)
        if expected != got:
            raise DataError(
                f"{model_file}: an exported tokenizer must give SentencePiece's own ids, but for {probe!r} "
                f"SentencePiece gives {expected} and the export gives {got}; train the tokenizer with "
                "normalization_rule_name='identity', remove_extra_whitespaces=False, byte_fallback=True, "
                "or use a Hugging Face tokenizer from the start"
            )
    # A template's own names must be read as the tokens that were trained.
    hugging_face.split_special_tokens = chat_template is None
    save_for_all_readers(hugging_face, folder)


def build_fast_tokenizer(model_file: Path, *, add_bos: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of ``model_file`` as a ``transformers`` object; a beginning token leads when ``add_bos``."""
    proto = _read_proto(model_file)
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise DataError(
            f"{model_file}: only unigram and BPE models with whitespace as prefix can be exported to Hugging "
            "Face; this one is another kind. Retrain it with model_type='bpe' or 'unigram'"
        )
    symbols = _user_defined_symbols(proto)
    tokenizer = Tokenizer(_unigram(proto) if kind == _UNIGRAM else _bpe(proto, bool(symbols)))
    steps = _normalizers(proto)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    splits = _splits(proto, symbols)
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    decoder = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        decoder.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoder)
    names = _special_names(proto)
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False, special=True) for p in proto.pieces if p.type == _CONTROL]
    )
    if add_bos and "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, proto.trainer_spec.bos_id)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, split_special_tokens=True, clean_up_tokenization_spaces=False, **names
    )


def _read_proto(model_file: Path):
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(Path(model_file).read_bytes())
    return proto


def user_defined_symbols(model_file: Path) -> list[str]:
    """Symbols that a model reads from any text before it looks for pieces."""
    return _user_defined_symbols(_read_proto(model_file))


def _user_defined_symbols(proto) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]


def _special_names(proto) -> dict[str, str]:
    """``{"bos_token": "<s>", ...}`` for the special pieces the model has."""
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}


def _normalizers(proto) -> list:
    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return steps


def _splits(proto, symbols: list[str]) -> list:
    """Cuts that make the model see text as SentencePiece's does."""
    splits = []
    if symbols:
        # SentencePiece takes user-defined symbols out before the model runs, the longest first.
        longest_first = sorted((s.replace(" ", _SPACE) for s in symbols), key=len, reverse=True)
        pattern = Regex("|".join(re.escape(symbol) for symbol in longest_first))
        splits.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    # BPE reaches a name only by ``ignore_merges``, see ``_bpe``
    reachable = proto.trainer_spec.model_type == _UNIGRAM or symbols
    if reachable and (tails := _cuts_inside_special_names(proto)):
        heads = "|".join(f"{re.escape(head)}(?={'|'.join(map(re.escape, tails[head]))})" for head in sorted(tails))
        splits.append(pre_tokenizers.Split(Regex(heads), behavior="merged_with_previous"))
    return splits


def _cuts_inside_special_names(proto) -> dict[str, list[str]]:
    """``{head: [tail, ...]}``: where to cut the names of control, unknown and byte pieces when they occur in text.

    Their names stand in the vocabulary of ``tokenizers``, so a model would match ``</s>`` written in a text;
    SentencePiece reads it as plain characters. A cut between two characters that no ordinary piece holds side by
    side prevents the match and changes nothing else. Where every such pair occurs in some piece, all the
    characters are known, and the score of the name (see ``_unigram``) keeps it from being chosen.
    """
    normal = [piece.piece for piece in proto.pieces if piece.type == _NORMAL]
    pairs = {name[i : i + 2] for name in normal for i in range(len(name) - 1)}
    known = {name for name in normal if len(name) == 1}

    def is_free(pair: str) -> bool:
        # two unknown characters in a row become one unknown token, which a cut would make two
        fuses = not proto.trainer_spec.byte_fallback and not known & set(pair)
        return pair not in pairs and not fuses

    tails: dict[str, list[str]] = {}
    for piece in proto.pieces:
        name = piece.piece
        if piece.type in (_NORMAL, _USER_DEFINED):
            continue
        cut = next((i for i in range(1, len(name)) if is_free(name[i - 1 : i + 1])), None)
        if cut is not None:
            tails.setdefault(name[:cut], []).append(name[cut:])
    return tails


def _unigram(proto) -> models.Unigram:
    """Scores as SentencePiece uses them; pieces that text must never match get one no path would choose."""
    normal = [piece.score for piece in proto.pieces if piece.type == _NORMAL]
    low, high = min(normal), max(normal)
    never = 8 * low - 100  # worse than spelling the longest such name, "<0x0A>", in the worst single pieces

    def score(piece) -> float:
        if piece.type == _USER_DEFINED:
            return len(piece.piece) * high - 0.1  # unigram_model.cc, PopulateNodes
        return piece.score if piece.type == _NORMAL else never

    vocab = [(piece.piece, score(piece)) for piece in proto.pieces]
    return models.Unigram(vocab, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)


def _bpe(proto, has_symbols: bool) -> models.BPE:
    """Every split of a piece into two pieces is a merge, the best-scored piece first (bpe_model.cc, Encode)."""
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda p: (-scores[p], vocab[p])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        held = [split for split in splits if split[0] in scores and split[1] in scores]
        merges.extend(sorted(held, key=lambda split: (vocab[split[0]], vocab[split[1]])))
    spec = proto.trainer_spec
    return models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=proto.pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=has_symbols,  # an isolated user-defined symbol is one token though no merge makes it
    )


_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names of transformers 5 that are new names of one class."""
_ONLY_NEW = ("backend", "is_local", "local_files_only")
"""What transformers 5 notes of how it read the tokenizer; nothing reads it again."""


def save_for_all_readers(tokenizer: Any, folder: Path) -> None:
    """``save_pretrained``, with the names in tokenizer_config.json that AutoTokenizer of transformers 4 and 5 know."""
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    written = config.get("tokenizer_class")
    config["tokenizer_class"] = _CLASSES.get(written, written)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 has a mapping of that name, and this name for a list
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    for name in _ONLY_NEW:
        config.pop(name, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
