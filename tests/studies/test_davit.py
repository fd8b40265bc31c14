import pytest

from regard.studies import davit, protocol


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(davit.STEPS, "smoke", 25)
    monkeypatch.setattr(davit, "TEST", 400)


def test_instruments_hold_and_windows_alone_are_blind():
    found = {f.claim: f for f in protocol.study("davit")}
    assert found["channel"].state == found["blind"].state == "holds"
    complement = found["complement"]
    if complement.state != "not measured":
        assert abs(complement.baseline - 0.5) < 0.08  # the control: chance, whatever the other arm does
    assert found["digits"].state == found["imagenet"].state == "not measured"


def test_arms_have_equal_parameters_but_for_the_channel_layer():
    assert davit._parameters("window") == davit._parameters("dual") == davit._parameters("channel")


def test_a_window_arm_that_learns_nothing_is_no_control(monkeypatch):
    monkeypatch.setattr(davit, "accuracy", lambda *_args, **_more: 0.5)
    finding = davit._complement(1, [0], "cpu")
    assert finding.state == "not measured"
    assert "premise not met" in finding.reason


def test_digits_too_easy_are_not_measured(monkeypatch):
    monkeypatch.setattr(davit, "accuracy", lambda *_args, **_more: 0.99)
    assert davit._digits(1, [0, 1], "cpu").state == "not measured"
    scores = {"window": 0.9, "channel": 0.8, "dual": 0.95}
    monkeypatch.setattr(davit, "accuracy", lambda arm, *_args, **_more: scores[arm])
    finding = davit._digits(1, [0, 1], "cpu")
    assert finding.state == "holds"
    assert finding.figure == pytest.approx(5.0)
