"""Which files of a repository a text model needs."""

import re

from huggingface_hub import ModelInfo

from common.errors import HubNotFound
from router.hub.store import FileRecord

_WEIGHTS = re.compile(r"model[A-Za-z0-9_.-]*\.safetensors")
_OTHERS = re.compile(
    r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template"
    r"|vocab|model\.safetensors\.index|preprocessor_config|processor_config)\.json"
    r"|[A-Za-z0-9_-]+\.(?:jinja|tiktoken)|(?:tokenizer|spiece|sentencepiece\.bpe|[a-z_]*tokenizer)\.model"
    r"|(?:merges|vocab)\.txt|LICENSE(?:\.txt|\.md)?"
)


def is_needed(name: str) -> bool:
    """Whether a text model needs the file. Names with folders, of code and of other formats are never taken."""
    return bool(_WEIGHTS.fullmatch(name) or _OTHERS.fullmatch(name)) and ".." not in name


def needed_files(model: ModelInfo) -> list[FileRecord]:
    """Records of the files to take. Raises `HubNotFound` when there are no weights, or no config, in a form we read."""
    files = [
        FileRecord(
            name=file.rfilename,
            size=(file.lfs.size if file.lfs else file.size) or 0,
            sha256=file.lfs.sha256 if file.lfs else None,
            blob_id=None if file.lfs else file.blob_id,
        )
        for file in model.siblings or ()
        if is_needed(file.rfilename)
    ]
    names = {file.name for file in files}
    if "config.json" not in names or not any(_WEIGHTS.fullmatch(name) for name in names):
        raise HubNotFound(
            f"{model.id} has no config.json with model*.safetensors (a GGUF or PyTorch repository, perhaps); "
            "look for another form of it with `mlxspec search`"
        )
    return files
