"""The classes of SentencePiece's model file, which protobuf makes at run time, where type checkers do not see them."""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2

_messages: Any = sentencepiece_model_pb2

ModelProto = _messages.ModelProto
PieceType = ModelProto.SentencePiece.Type
TrainerSpec = _messages.TrainerSpec
BPE = TrainerSpec.BPE
