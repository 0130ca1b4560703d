# The targets check-lit, check-py, check-mpi and check.
configure_file(
  "${CMAKE_CURRENT_LIST_DIR}/lit.site.cfg.py.in" "${CMAKE_BINARY_DIR}/lit_tests/lit.site.cfg.py" @ONLY)

# bactrian_check(<name> <command>...) adds a target that runs at the root of the repository, one at a time.
function(bactrian_check name)
  add_custom_target(check-${name}
    COMMAND ${ARGN}
    WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}"
    USES_TERMINAL
    COMMENT "check-${name}")
  list(APPEND BACTRIAN_CHECKS check-${name})
  set(BACTRIAN_CHECKS "${BACTRIAN_CHECKS}" PARENT_SCOPE)
endfunction()

bactrian_check(lit "${BACTRIAN_LIT}" -sv "${CMAKE_BINARY_DIR}/lit_tests")
bactrian_check(py "${Python3_EXECUTABLE}" -m pytest -m "not mpi")
if(BACTRIAN_MPIRUN)
  bactrian_check(mpi "${Python3_EXECUTABLE}" -m pytest -m mpi)
endif()
add_custom_target(check DEPENDS ${BACTRIAN_CHECKS})
