"""Attacks by files and names: refused in a line, nothing executed, nothing written, no memory taken."""

import pickle

from hostile import ATTACKS, Payload, attack_all


def test_attacks(tmp_path):
    assert len(ATTACKS) >= 60
    attack_all(tmp_path, sorted(ATTACKS))


def test_the_payload_is_sound(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
