"""Prints the Debian packages that are missing to build a C++ extension with OpenSSL; nothing where all is there."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig

SOURCE = "#include <openssl/sha.h>\nint main() { return SHA256_DIGEST_LENGTH != 32; }\n"


def main() -> None:
    missing = []
    if shutil.which("g++") is None:
        missing += ["g++", "libssl-dev"]
    elif subprocess.run(
        ["g++", "-x", "c++", "-o", "/dev/null", "-", "-lcrypto"], input=SOURCE.encode(), capture_output=True
    ).returncode:
        missing.append("libssl-dev")
    if not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"python3.{sys.version_info.minor}-dev")
    print(" ".join(missing))


main()
