"""Files from Hugging Face: found in that library's ordinary cache, or downloaded on first use.

    path = hub.download("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors")

A hub that does not answer is told of within 10 seconds, in one line that keeps the library's reason
and gives advice that fits it. (The library alone tries five times, which takes a minute.)
"""

import os

import command

TIMEOUT = 10  # seconds for an answer; a download that stalls ends by the library's own time-out


def download(repository, file):
    """The path of a file of a repository. Raises ConnectionError."""
    try:
        # It takes a second, and only downloads need it.
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return hf_hub_download(repository, file, local_files_only=True)
        except LocalEntryNotFoundError:
            probe(repository, file)
            return hf_hub_download(repository, file)
    except Exception as error:  # the libraries below it have many kinds
        raise ConnectionError(
            f"could not download {file} of {repository} ({reason(error)}): {advice(error)}, or "
            f"fetch it from https://huggingface.co/{repository} and name it (--weights; an "
            "autoencoder: --vae)"
        ) from error


def probe(repository, file):
    """Asks the hub for a file once, without the library's many trials: raises what it raises."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # no line for each trial
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set, and it is not in the cache")
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise ValueError(f"HF_ENDPOINT is {constants.ENDPOINT}, without https://")
    get_hf_file_metadata(hf_hub_url(repository, file), timeout=TIMEOUT)


def reason(error):
    """What an error says, in one short line."""
    words = command.one_line(error) or type(error).__name__
    return words if len(words) <= 300 else words[:300] + "..."


def advice(error):
    """What to do about an error of `probe` or of a download."""
    words = str(error).lower()
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ModuleNotFoundError) and error.name == "huggingface_hub":
        return "pip install huggingface_hub"
    if "socks" in words:
        return 'for a SOCKS proxy pip install "httpx[socks]", or unset ALL_PROXY and HTTPS_PROXY'
    if "OfflineModeIsEnabled" in kinds or "offline" in words:
        return "unset HF_HUB_OFFLINE to download it"
    if isinstance(error, ImportError):
        return "mend that library: it is installed, but does not load"
    if isinstance(error, PermissionError | NotADirectoryError) or "no space left" in words:
        return "set HF_HOME to a folder with room that you may write to"
    if type(error) is FileNotFoundError:
        return "check the paths in HF_HOME and SSL_CERT_FILE"
    if "GatedRepoError" in kinds:
        return "log in with `hf auth login` and accept its terms on its page"
    if kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError",
                "HFValidationError"}:
        return "check the name, and whether you are logged in"
    if any(os.environ.get(name) for name in ("HF_ENDPOINT", "HUGGINGFACE_HUB_ENDPOINT")):
        return "check HF_ENDPOINT (an address like https://huggingface.co) or unset it"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY",
                                             "all_proxy")):
        return "check the proxy in HTTPS_PROXY or ALL_PROXY"
    return "try again when there is a network"
