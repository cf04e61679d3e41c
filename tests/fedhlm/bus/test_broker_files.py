"""Certificate files that cannot be used are named, whatever their names are."""

import pytest

from fedhlm.bus.broker_url import BrokerUrl, TlsFiles
from fedhlm.errors import ConfigError


@pytest.mark.parametrize("files", [TlsFiles(ca="a\0b"), TlsFiles(cert="a\0b", key="c"), TlsFiles(ca="nowhere.pem")])
def test_a_file_that_cannot_be_opened_is_a_config_error(files: TlsFiles) -> None:
    with pytest.raises(ConfigError, match="broker.url"):
        BrokerUrl.parse("mqtts://host", files=files).ssl_context()
