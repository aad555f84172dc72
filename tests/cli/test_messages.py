"""The parser's messages are read for the mistakes that they name."""

from lit_rlhf.cli.messages import Rejection, read_message

MESSAGE = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lit_rlhf.algorithms.base.Algorithm'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lit_rlhf.RLOO':
        Parser key "judge":
          Does not validate against any of the Union subtypes
          Subtypes: [collections.abc.Callable[..., typing.Any], <class 'NoneType'>]
          Errors:
            - Expected a function
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: 7
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='judge', val='7')
"""


def test_the_mistake_is_read_from_a_nested_message():
    assert read_message(MESSAGE) == [Rejection("model.judge", "lit_rlhf.RLOO", "Expected a function", "7")]
    assert read_message("anything else") == [Rejection("", "", "anything else")]
